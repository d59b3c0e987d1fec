// The gallery: second pictures on hover, arrow keys in the grid, card size, the filter sheet.
import { remember } from "./shell.js";

document.addEventListener("pointerover", (event) => {
  const picture = event.target.closest?.(".card")?.querySelector("img[data-src]");
  if (!picture) return;
  picture.src = picture.dataset.src;
  delete picture.dataset.src;
});

document.addEventListener("keydown", (event) => {
  const link = event.target.closest(".card > a");
  if (!link || event.ctrlKey || event.metaKey || event.altKey) return;
  const links = [...document.querySelectorAll(".card > a")];
  const top = (element) => element.getBoundingClientRect().top;
  const columns = links.filter((other) => Math.abs(top(other) - top(links[0])) < 4).length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  const next = step && links[links.indexOf(link) + step];
  if (!next) return;
  event.preventDefault();
  next.focus();
});

// Fields that nobody filled in stay out of the address.
document.addEventListener("htmx:configRequest", (event) => {
  const fields = event.detail.formData;
  for (const [name, value] of [...fields]) if (value === "") fields.delete(name);
});

function prepare() {
  const size = document.getElementById("cards");
  size.closest(".cards-size").hidden = false;
  size.addEventListener("change", () => {
    document.getElementById("browse").dataset.cards = size.value;
    remember("cards", size.value);
  });
}
prepare();

// Choosing a filter replaces the sheet's own element: open the new one where the old one was.
let sheet = null;
document.addEventListener("htmx:beforeSwap", () => {
  const facets = document.querySelector("#facets:popover-open");
  sheet = facets && { scroll: facets.scrollTop };
});
document.addEventListener("htmx:afterSwap", (event) => {
  if (event.detail.target.id !== "browse") return;
  prepare();
  if (!sheet) return;
  const facets = document.getElementById("facets");
  facets.showPopover();
  facets.scrollTop = sheet.scroll;
});
