"""How gunicorn runs what is compared with the service."""

workers = 2
control_socket_disable = True
