"""`hedgehog report`: one HTML file that shows a run. Nothing in it may import torch: it runs on login nodes."""
