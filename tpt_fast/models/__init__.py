"""Models as the towers read them: one file a family of models, beside the weights and matrices that it fills."""
