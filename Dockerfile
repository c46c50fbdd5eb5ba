# The service as an image: docs/deploying.md says how to run it. Any base with Python 3.11 or newer
# and its venv module will do, as long as both stages have the same.
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
WORKDIR /app
RUN python3 -m venv /venv
COPY requirements.txt .
# Wheels alone, so that no compiler is needed; and nothing at run time needs pip.
RUN /venv/bin/pip install --no-cache-dir --disable-pip-version-check --only-binary :all: \
        --requirement requirements.txt \
    && /venv/bin/pip uninstall --yes --quiet pip setuptools
COPY . .
# The service may not write beside its code, so each start would compile it again; and it is another
# user than the one whose checkout this was.
RUN python3 -m compileall -q --invalidation-mode unchecked-hash . \
    && chmod -R a+rX .

FROM ${BASE}
LABEL org.opencontainers.image.title="livechat-visitors" \
      org.opencontainers.image.description="Rocket.Chat's livechat visitor API, with SQLite inside" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build /venv /venv
COPY --from=build /app /app
RUN install --directory --owner=10001 --group=10001 --mode=700 /data
# SQLite puts a large transaction's undo data into a temporary file, and the write fails where that
# cannot be made. Beside the database it always can; all else may be read-only.
ENV PATH=/venv/bin:$PATH PORT=3000 LIVECHAT_DB=/data/livechat.db TMPDIR=/data
WORKDIR /app
VOLUME /data
EXPOSE 3000
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["python", "-c", "\
import http.client, os, sys\n\
service = http.client.HTTPConnection('127.0.0.1', os.environ['PORT'], timeout=4)\n\
service.request('GET', '/livez')\n\
sys.exit(service.getresponse().status != 200)"]
CMD ["gunicorn"]
