"""Training by iterative contrastive refinement."""
