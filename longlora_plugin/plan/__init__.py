"""Will it fit, what will it cost: FLOPs and memory of a recipe, from the base's config alone.

`shape` and `parameters` read the model built without weights; `flops`, `memory`, `parallel`, `cost`
and `remedies` are arithmetic on plain values; `from_recipe` reads the recipe, `planner` puts them
together, `tables` and `plot` show it. LongLoRA (arXiv 2309.12307), Tables 11 and 12, holds it to
account in `benchmarks/paper.py`.
"""
