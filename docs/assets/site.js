// Statements of a formula stand side by side, a space (\quad) between them, or below each other where that is too wide.
function stacked(formula) {
  const lines = [""];
  let depth = 0;
  for (const part of formula.split(/(\\q?quad(?![a-zA-Z])|[{}])/)) {
    depth += (part === "{") - (part === "}");
    if (depth === 0 && part.startsWith("\\q")) lines.push("");
    else lines[lines.length - 1] += part;
  }
  return `\\begin{gathered}${lines.join("\\\\[0.4em]")}\\end{gathered}`;
}

for (const place of document.querySelectorAll(".math")) {
  const formula = place.textContent, displayMode = place.tagName === "DIV";
  katex.render(formula, place, { displayMode, throwOnError: false });
  if (displayMode && place.scrollWidth > place.clientWidth && !formula.includes("\\begin")) {
    katex.render(stacked(formula), place, { displayMode, throwOnError: false });
    if (place.scrollWidth > place.clientWidth) place.style.clear = "right"; // below the picture, not beside it
  }
}
