"""The SVG renderer without its check of references, for the test of the process's own bound."""

from flows.demo import svg_renderer
from infra.compute.bounded_processes import serve

if __name__ == "__main__":
    svg_renderer.external_reference = lambda svg: ""  # type: ignore[assignment]
    serve(svg_renderer.answer, svg_renderer.MEMORY_BYTES, may_open_files=False)
