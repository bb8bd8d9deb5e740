// Shows the rows that match every field; the fields are kept in the address.
const form = document.getElementById("filter");
const rows = [...document.querySelectorAll("#catalogue tbody tr")];
const fields = [...form.querySelectorAll("input, select")];
const apply = () => {
  let shown = 0;
  for (const row of rows) {
    const fits = fields.every(({ name, value }) =>
      name === "text"
        ? value.toLowerCase().split(/\s+/).every((word) => row.dataset.text.includes(word))
        : !value || row.dataset[name] === value);
    row.hidden = !fits;
    shown += fits;
  }
  form.querySelector("output").textContent = `${shown} of ${rows.length}`;
  const asked = new URLSearchParams(fields.filter((f) => f.value).map((f) => [f.name, f.value]));
  history.replaceState(null, "", asked.size ? `#${asked}` : "#");
};
const asked = new URLSearchParams(location.hash.slice(1));
for (const field of fields) field.value = asked.get(field.name) ?? "";
form.addEventListener("input", apply);
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;
apply();
