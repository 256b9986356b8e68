"""A trace for each request: the middleware, by hand and under a real server.

The package is `spanguard.asgi`.
"""
