"""Who: users, organisations, their names for ever, and the tokens they act with."""
