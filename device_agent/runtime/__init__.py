"""The C sources of the runtime and the runner, carried as data."""
