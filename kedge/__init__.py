"""kedge: compile models on a host, run and time them on remote devices."""
