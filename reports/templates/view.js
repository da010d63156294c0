// Asks for the page again every few seconds and takes over what has changed: what is typed and chosen stays.

const EVERY = 3000;
let mark = "";

function takeOver(part, fresh) {
  const focused = part.contains(document.activeElement) ? document.activeElement.name : null;
  const chosen = [...part.querySelectorAll("form.filters[data-for]")].map((form) => [form.dataset.for, [...new FormData(form)]]);
  const sorted = [...part.querySelectorAll("th[aria-sort]")].map((heading) => [
    heading.closest("table").id, heading.cellIndex, heading.getAttribute("aria-sort")]);
  part.replaceChildren(...fresh.childNodes);
  part.querySelectorAll("table.data").forEach(makeSortable);
  part.querySelectorAll("form.filters[data-for]").forEach(makeFilter);
  for (const [table, column, order] of sorted) {
    const heading = document.getElementById(table)?.tHead.rows[0].cells[column];
    heading?.firstChild.click();
    if (order === "descending") heading?.firstChild.click();
  }
  for (const [table, values] of chosen) {
    const form = part.querySelector(`form.filters[data-for="${table}"]`);
    for (const [name, value] of form ? values : []) form.elements[name].value = value;
    form?.dispatchEvent(new Event("input"));
    if (focused) form?.elements[focused]?.focus();
  }
}

async function ask() {
  const answer = await fetch(location.href, { headers: mark ? { "If-None-Match": mark } : {}, cache: "no-store" });
  if (answer.status !== 200) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const same = fresh.getElementById(part.id);
    if (same) takeOver(part, same); else if ("ends" in part.dataset) location.reload();
  }
  mark = answer.headers.get("ETag");
}

const heard = document.getElementById("heard");
if (heard) {
  setInterval(() => ask().then(() => { heard.textContent = ""; })
    .catch(() => { heard.textContent = "No answer: bench view has ended. This is what it showed last."; }), EVERY);
}
