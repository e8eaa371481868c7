"""How the embedded generative model and its five tasks are made; `python tools/build_mini_vqa.py`."""
