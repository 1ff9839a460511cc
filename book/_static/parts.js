// A page opened from disk may not read others, so the search then shows titles without excerpts.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}

// Hovering or focusing a citation, or touching it once, shows the reference's text. It is in the link's title, so this
// needs no network and no other page; without this script the browser shows the title itself.
document.addEventListener("DOMContentLoaded", () => {
  const box = document.createElement("div");
  box.id = "reference-box";
  box.setAttribute("role", "tooltip");
  box.hidden = true;
  document.body.append(box);
  let shown = null;

  const hide = () => {
    box.hidden = true;
    shown?.removeAttribute("aria-describedby");
    shown = null;
  };
  const show = (link) => {
    box.textContent = link.dataset.reference;
    box.hidden = false;
    const place = link.getBoundingClientRect();
    const below = place.bottom + box.offsetHeight + 8 < window.innerHeight;
    const left = Math.min(place.left, document.documentElement.clientWidth - box.offsetWidth - 8);
    box.style.left = `${Math.max(8, left)}px`;
    box.style.top = `${below ? place.bottom + 4 : Math.max(4, place.top - box.offsetHeight - 4)}px`;
    link.setAttribute("aria-describedby", box.id);
    shown = link;
  };

  for (const link of document.querySelectorAll('article a[href*="bibliography.html#"][title], article a[href^="#"][title]:not(.headerlink)')) {
    link.dataset.reference = link.title;
    link.removeAttribute("title");
    link.addEventListener("mouseenter", () => show(link));
    link.addEventListener("focus", () => show(link));
    link.addEventListener("mouseleave", hide);
    link.addEventListener("blur", hide);
    link.addEventListener("touchend", (event) => {
      if (shown !== link) {
        event.preventDefault();
        show(link);
      }
    });
  }
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  document.addEventListener("scroll", hide, true);
});
