"""The agent: dials the tracker, runs each job in a native runner. Python 3.9, grpcio and protobuf only."""
