"""Scores for pictures of a subject: CLIP-I, CLIP-T and DINO."""
