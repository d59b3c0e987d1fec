"""What benchmarks/merge_quality.py is made of; the tests reach in here.

study.py      which adapters, pairs and training seeds there are, and the trained files
variants.py   every way to combine two adapters that is compared
painting.py   prompts -> pictures, by the tiny pipeline with a change in its weights
scores.py     pictures -> numbers
statistics.py numbers of many pairs -> means with intervals
tables.py     means -> markdown
figures.py    pictures and means -> PNG
"""
