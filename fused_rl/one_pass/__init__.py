"""linear_policy_loss: the only room that knows the vocabulary and the loss."""
