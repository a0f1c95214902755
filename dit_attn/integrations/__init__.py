"""Other hosts: ComfyUI, servers, modular pipelines, the kernels hub. Nothing of a host is imported before it is used."""
