"""What is written on a span: payloads, outcomes, exceptions, and no value that loses a trace.

The package is `spanguard._record`.
"""
