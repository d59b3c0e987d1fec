// Full-screen pictures of a repo.

const viewer = document.getElementById("viewer");
const pictures = [...document.querySelectorAll("a[data-picture]")];
const image = viewer.querySelector("img");
const caption = viewer.querySelector(".caption p");
const copier = viewer.querySelector("[data-copy]");
let shown = 0;

function show(index) {
  shown = (index + pictures.length) % pictures.length;
  const { href, dataset } = pictures[shown];
  image.src = href;
  image.alt = dataset.caption;
  caption.textContent = dataset.caption;
  copier.dataset.copy = dataset.caption;
  copier.hidden = !dataset.caption;
}

pictures.forEach((picture, index) => {
  picture.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    show(index);
    viewer.showModal();
  });
});
for (const [name, step] of [["prev", -1], ["next", 1]]) {
  const button = viewer.querySelector(`.${name}`);
  button.hidden = pictures.length < 2;
  button.addEventListener("click", () => show(shown + step));
}
viewer.addEventListener("keydown", (event) => {
  if (event.key === "ArrowRight") show(shown + 1);
  if (event.key === "ArrowLeft") show(shown - 1);
});
viewer.addEventListener("click", (event) => {
  if (event.target.classList.contains("stage")) viewer.close();
});
viewer.addEventListener("close", () => pictures[shown].focus());
