"""The command line: one file a verb. `main` catches errors and turns them into exit codes."""
