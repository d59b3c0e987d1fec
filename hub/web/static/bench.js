// The bench: sliders beside the numbers, and a new report whenever something changed.
const form = document.getElementById("bench");
const share = document.getElementById("share");

function measure() {
  form.dispatchEvent(new Event("measure"));
}

for (const slide of form.querySelectorAll(".slide")) {
  const number = slide.parentElement.querySelector("[name=strength]");
  slide.hidden = false;
  slide.addEventListener("input", () => { number.value = slide.value; });
  number.addEventListener("input", () => { slide.value = number.value; });
}

// Where the result goes and what one is about to add do not change what is measured.
const SILENT = new Set(["add", "repo", "path"]);
form.addEventListener("input", (event) => {
  if (!SILENT.has(event.target.name)) measure();
});

document.addEventListener("htmx:afterSwap", (event) => {
  if (event.detail.target.id === "settings") measure();
  if (event.detail.target.id === "report" && share) share.dataset.copy = location.href;
});

// A report that did not come: what was shown before is not true any more.
for (const trouble of ["htmx:responseError", "htmx:sendError"]) {
  document.addEventListener(trouble, (event) => {
    if (event.detail.target.id === "report") event.detail.target.textContent = "The report could not be made. Change something to try again.";
  });
}
