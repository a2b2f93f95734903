"""The OpenAI-compatible surface: bodies in (strictly checked), answers and chunks out.

Owns field names, ranges, error codes and the shapes of answers. It must not know Redis, threads or sockets: it turns a
body into prompts and sampling parameters, and pieces of a choice into JSON.
"""
