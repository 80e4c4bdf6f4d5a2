"""The command line. Torch is never imported here: the first answer should feel instant."""
