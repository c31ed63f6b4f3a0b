"""The window: the commands as pages in a browser. Only `server` and what is below `pages` know Gradio."""
