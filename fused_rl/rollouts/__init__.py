"""What becomes of rollouts before the loss: rewards, advantages, weights; and how a run goes."""
