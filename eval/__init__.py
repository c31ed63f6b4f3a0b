"""Scores for images of a subject: CLIP-I, CLIP-T, DINO and others, and pages that show them side by side."""
