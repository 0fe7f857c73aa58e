"""The command line: one module for each verb. `main` turns errors into exit codes."""
