"""``cacheblend dashboard``: a web page of what a request log and a store's directory tell; the extra ``dashboard``."""
