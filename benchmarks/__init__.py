"""The speed and memory claims, each reproduced by one command."""
