"""Language models through the same adapters: what the SingLoRA article reports beside images, table by table.

`docs/article.md` has the commands and what they gave.
"""
