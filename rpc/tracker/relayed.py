"""What a tracker that follows says of the caller beside each call that it hands on to the leader."""

#: Metadata of a relayed call: a device's certificate (PEM), and where the caller is.
CERTIFICATE_KEY = "kedge-certificate-bin"
PEER_KEY = "kedge-peer"
#: The port at which the tracker that relays serves agents: devices that enrol there come back there.
AGENTS_PORT_KEY = "kedge-agents-port"
