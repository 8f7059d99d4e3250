"""The tracker: a pure core, a database, and a thin gRPC shell."""
