"""What is learnt from: images, prompts, latents, and the order in which they are drawn."""
