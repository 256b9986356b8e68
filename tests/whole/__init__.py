"""What runs the whole house: random programs, interrupts, the collector, what the papers say.

No single package promises what is tested here.
"""
