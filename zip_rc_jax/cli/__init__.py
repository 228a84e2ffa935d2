"""The command line: one file a command.

`main` builds the parser, runs the command and says how it ended. Each command is a file with
`add_parser` and `run`. `common`, `console`, `live`, `decode_output` and `predict_output` are what
they share or write. Heavy imports stay inside functions, so that `--help` is quick.
"""
