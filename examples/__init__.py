"""Small worlds in which the whole loop can be watched: the demo's, and SmolLM2's."""
