"""What runs once per node beside the training ranks: the keeper, its memory and its wire."""
