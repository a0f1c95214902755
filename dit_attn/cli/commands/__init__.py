"""The commands of `dit-attn`: one file or folder each, imported only when its command is used."""
