"""What a model's refinement does on a retrieval set: the paper's premises, tables and figures, null models and further halting rules."""
