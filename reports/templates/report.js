"use strict";
// Sorts and filters the tables, and enlarges pictures. Without it the page still shows everything.

const key = (row, column) => row.cells[column].dataset.sort;

function sort(table, column, heading) {
  const body = table.tBodies[0];
  const falling = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const numeric = heading.classList.contains("number");
  const compare = (a, b) => {
    const [one, other] = [key(a, column), key(b, column)];
    if (one === "" || other === "") return (one === "") - (other === ""); // what was not measured stays last
    return falling * (numeric ? one - other : one.localeCompare(other, undefined, { numeric: true }));
  };
  body.append(...[...body.rows].sort(compare));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", falling > 0 ? "ascending" : "descending");
}

function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => sort(table, column, heading));
  });
}

function makeFilter(form) {
  const rows = [...document.getElementById(form.dataset.for).tBodies[0].rows];
  const apply = () => {
    const wanted = [...new FormData(form)].filter(([, value]) => value !== "");
    for (const row of rows) {
      row.hidden = !wanted.every(([name, value]) =>
        name === "text" ? row.textContent.toLowerCase().includes(value.toLowerCase()) : row.dataset[name] === value);
    }
    const left = rows.filter((row) => !row.hidden).length;
    form.querySelector("output").textContent = `${left} of ${rows.length} rows`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply();
}

document.querySelectorAll("table.data").forEach(makeSortable);
document.querySelectorAll("form.filters[data-for]").forEach(makeFilter);

const dialog = document.getElementById("zoom");
const pictures = [...document.querySelectorAll("button.zoom")];
let place = 0;

function show(index) {
  place = (index + pictures.length) % pictures.length;
  const picture = pictures[place].querySelector("img");
  const large = dialog.querySelector("img");
  large.src = picture.src;
  large.alt = picture.alt;
  large.classList.toggle("wide", picture.naturalWidth > 2 * picture.naturalHeight || picture.closest(".ready") !== null);
  dialog.querySelector("p").textContent = picture.alt;
}

pictures.forEach((button, index) => button.addEventListener("click", () => { show(index); dialog.showModal(); }));
for (const button of dialog.querySelectorAll("[data-step]")) {
  button.addEventListener("click", () => show(place + Number(button.dataset.step)));
}
dialog.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step) show(place + step);
});
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => pictures[place].focus());
