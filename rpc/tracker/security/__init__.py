"""Who may do what on a tracker: its CA, tokens, enrolled devices, the interceptor that checks every call, the audit."""
