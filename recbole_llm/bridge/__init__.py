"""The only code that knows RecBole's internals."""
