"""Our models in other people's frameworks: one file for each."""
