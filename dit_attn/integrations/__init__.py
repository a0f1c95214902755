"""Other hosts: ComfyUI, servers, modular pipelines, the kernels hub; none is imported before it is used."""
