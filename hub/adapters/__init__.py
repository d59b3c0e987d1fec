"""The catalogue: what the files at each repo's `main` say they are."""
