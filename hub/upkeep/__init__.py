"""What keeps a hub's data whole: checked, swept, collected, copied, brought back, rebuilt.

It stands above every other part, and nothing below imports it.
"""
