// What is shown stays when the server can't be reached: say that it is old.
document.addEventListener("htmx:afterRequest", (event) => {
  document.body.classList.toggle("stale", !event.detail.successful);
});
