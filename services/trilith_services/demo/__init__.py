"""The main job on public data: click models on MovieLens, on a cluster and without one."""
