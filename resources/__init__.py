"""The resources, one module a URL family; `app.create_app` gives each its routes."""
