"""Ranks that move while a model is trained; `trainer` and `trainer_callback` are the front doors.

model_allocator.py   the allocator of a model's layers, costs and present ranks
probe.py             RankProbe: what present and new ranks are worth
probe_layers.py      of which layers
curves.py            in the quadratic model
probe_batches.py     on which batches: given ones,
captured_batches.py  or what the model was last called with
controller_state.py  what a restart needs
checkpoint.py        and a checkpoint's folder
together.py          several processes
"""
